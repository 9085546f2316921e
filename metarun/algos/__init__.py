"""The methods: one paper a file. README.md lists what a method defines, and shows how to write one."""
