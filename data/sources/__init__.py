"""Sources of text: what they are, which files they have, how these are cut into units, and reading their rows.

spec.py      SourceSpec                 name, path, language, format ...: configuration, YAML and command line
resolve.py   resolve(spec)              its files with sizes and stamps: local, http, s3, hub
units.py     plan_units(spec, files)    pieces that can be read on their own
read.py      read_unit(spec, unit)      rows of text, lazily; bad rows say what is wrong with them
tokens.py    read_tokens(spec, unit)    documents of files that hold token ids already
"""

from data.sources.read import Row, read_documents, read_unit
from data.sources.resolve import SourceFile, check_unchanged, resolve
from data.sources.spec import SourceSpec, parse_source, read_sources_file, spec_from_mapping
from data.sources.units import Unit, plan_units

__all__ = [
    "Row",
    "SourceFile",
    "SourceSpec",
    "Unit",
    "check_unchanged",
    "parse_source",
    "plan_units",
    "read_documents",
    "read_sources_file",
    "read_unit",
    "resolve",
    "spec_from_mapping",
]
