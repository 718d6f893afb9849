"""Keep OUT in an object store. `ObjectStore` is a Store, whose lock is a lease.

To add a service, write a file with a class that implements `conditional_puts.ConditionalPuts`, and add it to
`service.SERVICES`.
"""

from batch_infer.store.objects.store import ObjectStore

__all__ = ["ObjectStore"]
