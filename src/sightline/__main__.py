"""`python -m sightline`."""

from sightline.cli import main

raise SystemExit(main())
