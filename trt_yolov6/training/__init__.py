"""Training by the paper's recipe.

    data set ──TrainingSet──▶ batches ──model.raw──▶ assignment, losses ──▶ trainer ──▶ checkpoint

Imports nothing: PyTorch is loaded by the modules that need it.
"""
