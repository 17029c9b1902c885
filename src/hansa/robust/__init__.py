# SPDX-License-Identifier: Apache-2.0
"""Rules that stand sites which lie: in place of the mean, one family a file; ``defend`` puts a strategy behind one.

With n updates x_1 ... x_n, each counted once, of which f may be anything at all:

===================  ==========================================  =======  ============================================
rule                 result                                      n, least  of f lies
===================  ==========================================  =======  ============================================
``mean``             Σ x_i / n                                   2f + 1   each moves it by up to 2 max_norm / n
``median``           the median of each coordinate               2f + 1   stays within the honest values, coordinate
                                                                          by coordinate
``trimmed-mean``     the mean without the f largest and the f    2f + 1   the same
                     smallest of each coordinate
``krum``             the x_i with the least sum of squared       2f + 3   one update, close to its n − f − 2 nearest
                     distances to its n − f − 2 nearest
``multi-krum``       the mean of the n − f of the least sums     2f + 3   a mean of updates that lie close together
``geometric-median`` argmin_v Σ ‖v − x_i‖                        2f + 1   moves by at most a multiple of the honest
                                                                          updates' spread
===================  ==========================================  =======  ============================================

Weights are left out on purpose: a site states its own, and one that lies would state a large one.
"""
