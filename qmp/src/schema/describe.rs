//! The types of commands and events in the form of `query-qmp-schema`.
//!
//! schemars knows the members, names and optionality of a type from the same serde attributes that
//! read and write it; this module only converts that to QEMU's form. Types keep their own names
//! (QEMU numbers them). Where a reader accepts more than its type (see `decode`), the type is
//! described.
use std::collections::{BTreeMap, BTreeSet};

use schemars::{JsonSchema, generate::SchemaSettings};
use serde_json::{Map, Value};

use super::{Command, Event, EventInfo, SchemaInfo, SchemaMember, SchemaMetaType};

/// Collects entries; each type only once.
pub struct Describer {
    generator: schemars::SchemaGenerator,
    entries: Vec<SchemaInfo>,
    types: BTreeMap<String, SchemaInfo>,
    /// Types seen so far, to end recursion.
    seen: BTreeSet<String>,
}

impl Describer {
    /// A describer with all events, and no commands yet.
    pub fn with_events() -> Self {
        let generator = SchemaSettings::draft2020_12().into_generator();
        let mut this =
            Self { generator, entries: Vec::new(), types: BTreeMap::new(), seen: BTreeSet::new() };
        let schema = this.generator.root_schema_for::<Event>().to_value();
        for (name, data) in variants(&schema) {
            let arg_type = this.object(&format!("{name}-arg"), data);
            let entry =
                SchemaInfo { arg_type: Some(arg_type), ..info(name, SchemaMetaType::Event) };
            this.entries.push(entry);
        }
        this
    }

    /// Adds command `C`.
    pub fn command<C: Command>(&mut self) {
        let (arg_type, ret_type) = (self.root::<C>(), self.root::<C::Return>());
        let entry = SchemaInfo {
            arg_type: Some(arg_type),
            ret_type: Some(ret_type),
            ..info(C::NAME, SchemaMetaType::Command)
        };
        self.entries.push(entry);
    }

    /// All entries: commands and events, then types.
    pub fn finish(mut self) -> Vec<SchemaInfo> {
        self.entries.extend(self.types.into_values());
        self.entries
    }

    fn root<T: JsonSchema>(&mut self) -> String {
        let schema = self.generator.subschema_for::<T>().to_value();
        self.reference(&schema)
    }

    /// Name of the type `schema`, which is described when first seen.
    fn reference(&mut self, schema: &Value) -> String {
        if let Some(name) = schema["$ref"].as_str().and_then(|path| path.rsplit('/').next()) {
            if self.seen.insert(name.into()) {
                let body = self.generator.definitions().get(name).cloned().unwrap_or_default();
                self.named(name, &body);
            }
            return name.into();
        }
        // Option<T> of a named type: T or null.
        if let Some(of_type) = schema.get("anyOf").and_then(|options| options.get(0)) {
            return self.reference(of_type);
        }
        let kind = match &schema["type"] {
            // Option<T> of a builtin: T or null.
            Value::Array(kinds) => kinds.first().and_then(Value::as_str),
            kind => kind.as_str(),
        };
        match kind {
            Some("array") => {
                let element = self.reference(&schema["items"]);
                let name = format!("[{element}]");
                let entry = SchemaInfo {
                    element_type: Some(element),
                    ..info(&name, SchemaMetaType::Array)
                };
                self.types.insert(name.clone(), entry);
                name
            }
            Some("string") => self.builtin("str"),
            Some("integer") => self.builtin("int"),
            Some("number") => self.builtin("number"),
            Some("boolean") => self.builtin("bool"),
            _ => self.builtin("any"),
        }
    }

    fn named(&mut self, name: &str, body: &Value) {
        match body["type"].as_str() {
            Some("object") => {
                self.object(name, body);
            }
            _ => {
                let values = enum_values(body);
                let members = values
                    .iter()
                    .map(|v| SchemaMember { name: v.clone(), r#type: None, default: None })
                    .collect();
                let entry = SchemaInfo {
                    members: Some(members),
                    values: Some(values),
                    ..info(name, SchemaMetaType::Enum)
                };
                self.types.insert(name.into(), entry);
            }
        }
    }

    fn object(&mut self, name: &str, body: &Value) -> String {
        let required = body["required"].as_array().map_or(&[][..], Vec::as_slice);
        let no_properties = Map::new();
        let properties = body["properties"].as_object().unwrap_or(&no_properties);
        let members = properties
            .iter()
            .map(|(name, schema)| SchemaMember {
                name: name.clone(),
                r#type: Some(self.reference(schema)),
                default: (!required.iter().any(|r| r == name)).then_some(Value::Null),
            })
            .collect();
        let entry = SchemaInfo { members: Some(members), ..info(name, SchemaMetaType::Object) };
        self.types.insert(name.into(), entry);
        name.into()
    }

    fn builtin(&mut self, name: &str) -> String {
        let json_type = match name {
            "str" => "string",
            "bool" => "boolean",
            "any" => "value",
            same => same,
        };
        let entry =
            SchemaInfo { json_type: Some(json_type.into()), ..info(name, SchemaMetaType::Builtin) };
        self.types.insert(name.into(), entry);
        name.into()
    }
}

/// Reply to [`super::QueryEvents`].
pub fn event_names() -> Vec<EventInfo> {
    let schema = SchemaSettings::draft2020_12().into_generator().into_root_schema_for::<Event>();
    variants(schema.as_value()).map(|(name, _)| EventInfo { name: name.into() }).collect()
}

fn info(name: &str, meta_type: SchemaMetaType) -> SchemaInfo {
    SchemaInfo {
        name: name.into(),
        meta_type,
        arg_type: None,
        ret_type: None,
        json_type: None,
        element_type: None,
        members: None,
        values: None,
    }
}

/// Name and data of each event.
fn variants(schema: &Value) -> impl Iterator<Item = (&str, &Value)> {
    let variants = schema["oneOf"].as_array().map_or(&[][..], Vec::as_slice);
    variants.iter().filter_map(|variant| {
        let properties = variant.get("properties")?;
        Some((properties.get("event")?.get("const")?.as_str()?, properties.get("data")?))
    })
}

/// Values of an enum of strings, with documentation on each value (`oneOf`) or without (`enum`).
fn enum_values(body: &Value) -> Vec<String> {
    let plain = body["enum"].as_array().into_iter().flatten();
    let documented = body["oneOf"].as_array().into_iter().flatten().map(|one| &one["const"]);
    plain.chain(documented).filter_map(|value| value.as_str().map(Into::into)).collect()
}
