"""Makes the files of a checkpoint in a form (ZeRO stage, world size, universal) that the newest source does not have.

Each file's object tree starts as a copy of the newest checkpoint's, so that parameter groups, counters, client state
and everything else that the training job saved are kept; only the entries that depend on the form are new. The same
code that reads checkpoints (`wsm_ds.layouts`) then says where elements lie in the new files.
"""
