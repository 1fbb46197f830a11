from sgl_kernel import __getattr__ as __getattr__

__version__ = "0.0"
