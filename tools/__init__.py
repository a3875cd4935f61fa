"""Programs for data, curves and results. python -m tools.NAME --help explains one; python data.py runs check_data."""
