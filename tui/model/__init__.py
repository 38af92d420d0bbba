"""View models: streams of rows and events folded into what a screen shows. Pure: `now` is always an argument."""
