"""Benchmarks: `python -m bench latency | throughput`. Each prints a table and ends with one line of JSON."""
