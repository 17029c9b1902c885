# SPDX-License-Identifier: Apache-2.0
"""Homomorphic encryption: the server adds up what it can't read, and one site decrypts the sum.

=====================  ===========================================================================
:mod:`~.protocol`      who sends what to whom, what is promised; terms and messages
:mod:`~.site`          the sites' side, and that of the one that holds the secret key
:mod:`~.server`        the server's side
:mod:`~.agreement`     what a job's words mean: what is summed, in which ranges, at which cost
:mod:`~.ckks`          integers that are added while nobody can read them
=====================  ===========================================================================
"""
