#!/bin/sh
# The report is tested in a real browser. Install Debian's Chromium where it is missing and we may; else those tests
# skip, and say so.
set -eu
for name in chromium chromium-browser google-chrome; do
  command -v "$name" >/dev/null 2>&1 && exit 0
done
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1; then
  (apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium) >/dev/null 2>&1 ||
    echo "could not install chromium: the browser tests will be skipped" >&2
else
  echo "no chromium found: the browser tests will be skipped (apt-get install chromium)" >&2
fi
