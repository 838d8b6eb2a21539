"""From a run to what people and programs read: report.json and its schema, Markdown, page, plots, terminal, runs."""
