"""`make monitoring`."""

import sys

from deployment.monitoring.command import main

sys.exit(main())
