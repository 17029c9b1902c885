# SPDX-License-Identifier: Apache-2.0
"""The audit: attacks carried out for real on a job's own protection, and what they found."""
