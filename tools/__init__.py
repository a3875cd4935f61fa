"""Programs for data, curves and results. python -m tools.NAME --help explains each; python data.py runs check_data."""
