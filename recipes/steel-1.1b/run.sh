#!/usr/bin/env bash
cd "$(dirname "$0")/../.." && exec bash runs/recipe.sh recipes/steel-1.1b "$@"
