"""Healthcheck of a container: exits 0 when the URL answers 200 within three seconds (slim images have no curl)."""

import sys
import urllib.error
import urllib.request

try:
    with urllib.request.urlopen(sys.argv[1], timeout=3) as response:
        sys.exit(response.status != 200)
except (urllib.error.URLError, OSError) as error:
    sys.exit(f"{sys.argv[1]}: {error}")
