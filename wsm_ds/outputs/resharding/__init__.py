"""Layouts out: the files of a checkpoint in a form that the newest source does not have.

Each file's object tree is made from the newest checkpoint's, so that parameter groups, counters, client state and
whatever else a training job put there live on; only what the form decides is new. The reader that reads checkpoints
then says where the elements belong.
"""
