"""One stage of a run, as a Ray job: `ray job submit -- python jobs/stage.py --run-dir DIR --stage p --app NAME`."""

import sys

from bt_ray.stages.__main__ import main

sys.exit(main())
