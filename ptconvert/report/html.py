"""HTML reports: each one file without scripts or external resources, which reads the same on
screen, on paper and by mail.

`templates/` has a template for each report. It extends `page.html`, which is the look that all
share, and takes tables and lists from `parts.html`. What is put into a template is escaped, but
for `Markup`, which the charts are.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

from markupsafe import Markup

if TYPE_CHECKING:
    from jinja2 import Environment


@cache
def environment() -> Environment:
    """The one environment in which all templates are rendered."""
    # not above: it takes 0.1 s, a fifth of what an estimate without a report takes
    from jinja2 import Environment, PackageLoader, StrictUndefined

    return Environment(
        loader=PackageLoader("ptconvert.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def render(template: str, **data: object) -> Markup:
    """A template of `templates/`, filled in."""
    return Markup(environment().get_template(template).render(data))
