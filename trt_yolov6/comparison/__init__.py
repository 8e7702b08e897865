"""The comparison of detectors: which of them, at which precision, is best for its latency here.

    plan ──▶ build what must be built ──▶ AP, once an engine ──▶ latency, in rounds ──▶ results

`plan` says what is compared, `engines` builds it, `measure` and `agreement` have the steps that
measure, `rounds` is about latency, and `cache` keeps what was done once. `records` puts the results
together, whose file `results` documents and reads; `gate` holds them against earlier ones. `run` is
the whole.
"""
