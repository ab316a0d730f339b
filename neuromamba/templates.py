"""Where the templates of HTML pages come from."""

from __future__ import annotations

import jinja2


def environment() -> jinja2.Environment:
    """The package's `*.j2`: values are escaped, and a name that is not given is an error."""
    return jinja2.Environment(
        loader=jinja2.PackageLoader("neuromamba", "."),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
