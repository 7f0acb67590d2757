"""`python -m sds_agent` is the command `sds-agent`."""

import sys

from sds_agent.cli.main import main

sys.exit(main())
