"""HTTP: health and metrics now, the API of DESIGN 3.4 later."""
