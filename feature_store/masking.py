"""The one place where a password is taken out of an address before the address is shown."""

from __future__ import annotations

import re

SECRET = r"[\w.-]*(?:password|passwd|pwd|secret|token)[\w.-]*"
_IN_URL = re.compile(rf"(?i)\b({SECRET}=)[^&\s]*")
_IN_LIST = re.compile(rf"(?i)\b({SECRET}\s*=\s*)[^,]*")
_USER = re.compile(r"^([^:@/,]*://)?([^:@/]*):(?!//)(.*)@", re.DOTALL)


def masked(address: str) -> str:
    """`address` for messages: what may be a password is `***`; user, host, port and database stay. Pure.

    Forms: `scheme://user:password@host/...` with any of `@ : / ?` in the password, the same without a scheme, options of
    a URL (`?password=...&sslpassword=...`), and Feast's and libpq's lists (`host:port,db=0,password=...`). When in doubt
    more is hidden than need be.
    """
    options = _IN_URL if "://" in address else _IN_LIST
    return _USER.sub(r"\1\2:***@", options.sub(r"\1***", address))
