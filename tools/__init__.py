"""Programs for data, curves and results: python -m tools.NAME --help; check_data also runs as python data.py"""
