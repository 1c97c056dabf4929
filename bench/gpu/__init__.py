"""The stages of `bench/gpu_check.sh`, for a machine that has a GPU for some minutes.

`__main__` runs them, each in processes of its own (`tasks`) with a time limit. `record` keeps the results, readable at
every moment, and `table` is their summary. Every other module is the process of one stage, `python -m bench.gpu.NAME`;
it reports each figure as soon as it is measured.
"""
