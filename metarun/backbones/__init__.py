"""The networks that methods train. README.md names the contract, and shows how to write one."""
