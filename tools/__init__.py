"""Programs beside training: python -m tools.NAME --help, and python data.py for check_data"""
