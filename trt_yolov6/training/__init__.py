"""Training as the paper has it: what produces checkpoints worth deploying.

    data set ──TrainingSet──▶ batches ──model.raw──▶ assignment, losses ──▶ trainer ──▶ checkpoint

Imports nothing: PyTorch is loaded by the modules that need it.
"""
