#!/usr/bin/env bash
cd "$(dirname "$0")/../.." && exec bash runs/recipe.sh recipes/buddygpt-0.1b "$@"
