# Makes the virtual environment that all scripts use, or finds that it is up to date. Sourced, from the repository's root.
# A stamp of what it was made from makes the second run fast.
PYTHON=${PYTHON:-python3}
VENV=${SHARDPREP_VENV:-.venv}
want=$(cat pyproject.toml scripts/constraints.txt | sha256sum | cut -d' ' -f1)-$("$PYTHON" -c 'import sys; print(*sys.version_info[:3])')
if [ "$(cat "$VENV/.shardprep-stamp" 2>/dev/null)" != "$want" ]; then
  echo "setting up $VENV ..." >&2
  "$PYTHON" -m venv --clear "$VENV"
  "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check -c scripts/constraints.txt -e '.[dev]'
  printf '%s' "$want" > "$VENV/.shardprep-stamp"
fi
PATH="$PWD/$VENV/bin:$PATH"
