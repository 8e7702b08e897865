"""Batch work on many machines by Ray Data: detection and evaluation, with one engine an actor.

pictures -> what a job reads        engine_files -> the engine on every machine
cluster  -> who computes it         detector     -> the actor
parts    -> results, resumed        jobs         -> `infer` and `eval`
"""
