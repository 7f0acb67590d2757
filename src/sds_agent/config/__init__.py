"""One YAML file and the environment, read into typed settings, with every error reported at once.

A file, the environment and the defaults become a `Document` (source, environment, defaults), which is read through the
shapes that the settings declare (shapes, scalars, settings); what only shows when keys are compared is checked last
(conflicts). `loading.load` does all of it. The JSON Schema for editors is written from the same shapes (schema).
"""
