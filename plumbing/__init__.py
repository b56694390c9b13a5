"""
The machinery that every training script shares, so that a script can be about its algorithm.

    options.py      a dataclass and its comments become the command line
    run.py          one run of one stage: ranks, seed, output folder, the helpers of every loop
    device.py       where a run computes and in which precision
    guard.py        which updates would do harm; float16's loss scale
    metrics.py      logged figures become rows of metrics.jsonl
    checkpoints.py  a run's state on the disk: whole or absent, damaged ones named
    claim.py        whose a folder is: one writer, nothing removed that no run wrote
    inputs.py       what a run reads, and whether it is the same after a stop
    folders.py      model folders: written at the end of a stage, read at the start of the next
    optimizers.py   learning rates, AdamW, Adam, Muon
    forecast.py     a run's tokens, FLOPs, memory and time, before it starts
    curves.py       metrics.jsonl, and the picture of it

plumbing/ knows the model; the model and the files below it do not know plumbing/.
"""
