import sys

import exercises
from config import one_line_errors

with one_line_errors():
    sys.exit(exercises.main(sys.argv[1:]))
