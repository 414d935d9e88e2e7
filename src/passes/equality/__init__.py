"""Evidence that a rewrite keeps results: certificates for single firings of rules."""

from .certificate import Certificate, Certifier, certify_region
from .region import Region

__all__ = ["Certificate", "Certifier", "Region", "certify_region"]
