"""The benchmark: one concern a module, each with a `run(ctx)` that returns metrics. It uses only the public API and the
loader's counters; `suite` runs the parts, `report` writes them down."""
