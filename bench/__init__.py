"""The benchmark. Data flows one way: `suite` runs the `parts`, each of which returns figures (`metrics`) whose times
come from `timing` and whose worth from `statistics`; `machine` watches meanwhile, `journal` keeps each finished row;
`reporting` writes it all down, `comparing` sets runs side by side. It uses only the public API, the loader's counters
and the launchers of the floor kernel."""
