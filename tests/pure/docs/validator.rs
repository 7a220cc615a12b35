//! A JSON Schema, compiled.

use boon::{Compiler, SchemaIndex, Schemas};
use serde_json::Value;

pub struct Validator {
    schemas: Schemas,
    index: SchemaIndex,
}

impl Validator {
    pub fn new(schema: &Value) -> Self {
        let (mut schemas, mut compiler) = (Schemas::new(), Compiler::new());
        compiler.add_resource("file:///schema.json", schema.clone()).unwrap();
        let index = compiler.compile("file:///schema.json", &mut schemas);
        Self { index: index.unwrap_or_else(|error| panic!("{error:#}\n{schema:#}")), schemas }
    }

    pub fn validate(&self, value: &Value) -> Result<(), String> {
        self.schemas.validate(value, self.index).map_err(|error| format!("{error:#}"))
    }
}
