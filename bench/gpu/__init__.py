"""What `bench/gpu_check.sh` runs on a machine that has a GPU for some minutes.

`__main__` runs the stages, each in processes of its own and within its own time; `record` keeps what they found, so
that whatever ends the check leaves it readable; `table` says it in 40 lines. Every other module is one stage's process,
`python -m bench.gpu.NAME`, which reports each figure as soon as it is there.
"""
