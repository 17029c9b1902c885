# SPDX-License-Identifier: Apache-2.0
"""Ways to split one data set into sites for a simulation, one a file.

A partition is built from a job's options and is then a pure function of the rows:
``split(rows: Rows, seed: int) -> dict[str, list[int]]``, site name -> row indices.
"""
