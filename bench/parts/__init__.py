"""What is measured: one concern a module with a `run(ctx)`, run by `suite` in its order, and what these stand on."""
