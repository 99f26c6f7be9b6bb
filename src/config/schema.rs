//! PURE. The JSON Schema of the configuration, out of the same list of keys that the parser reads.

use serde_json::{Map, Value, json};

use super::keys::{Default, FILE, Key, Kind, Table};

/// What humantime takes, roughly: numbers with units.
const DURATION: &str = r"( *[0-9]+ *[a-zA-Z]+)+ *";

/// For editors: completion, descriptions, and most errors while typing.
pub fn schema() -> Value {
    let mut definitions = Map::new();
    let mut schema = table(&FILE, &mut definitions);
    schema["$schema"] = json!("http://json-schema.org/draft-07/schema#");
    schema["title"] = json!("preface");
    schema["definitions"] = Value::Object(definitions);
    schema
}

fn table(table: &'static Table, definitions: &mut Map<String, Value>) -> Value {
    let keys = || table.keys.iter().filter(|key| !matches!(key.kind, Kind::Later));
    let properties: Map<String, Value> = keys().map(|key| (key.name.to_owned(), property(key, definitions))).collect();
    let required: Vec<&str> = keys().filter(|key| key.default == Default::Required).map(|key| key.name).collect();
    let mut schema = json!({
        "type": "object",
        "description": table.doc,
        "additionalProperties": false,
        "properties": properties,
    });
    if !required.is_empty() {
        schema["required"] = json!(required);
    }
    schema
}

fn property(key: &'static Key, definitions: &mut Map<String, Value>) -> Value {
    let mut schema = match &key.kind {
        Kind::Boolean => json!({ "type": "boolean" }),
        Kind::Integer(min, max) => json!({ "type": "integer", "minimum": min, "maximum": max }),
        Kind::Duration(..) => json!({ "type": "string", "pattern": format!("^{DURATION}$") }),
        Kind::DurationOrOff(..) => json!({ "type": "string", "pattern": format!("^(off|{DURATION})$") }),
        Kind::Word { now, .. } => json!({ "type": "string", "enum": now }),
        Kind::Words { now, .. } => {
            let word = json!({ "type": "string", "enum": now });
            json!({ "oneOf": [word, { "type": "array", "minItems": 1, "uniqueItems": true, "items": word }] })
        }
        Kind::Text(_) => json!({ "type": "string" }),
        Kind::Texts(_) => {
            json!({ "oneOf": [{ "type": "string" }, { "type": "array", "items": { "type": "string" } }] })
        }
        Kind::Table(table) => return reference(table, definitions),
        Kind::Named(table) => json!({ "type": "object", "additionalProperties": reference(table, definitions) }),
        Kind::List(table) => json!({ "type": "array", "items": reference(table, definitions) }),
        Kind::ListOrTexts(table) => {
            let element = json!({ "oneOf": [{ "type": "string" }, reference(table, definitions)] });
            json!({ "type": "array", "minItems": 1, "items": element })
        }
        Kind::Later => unreachable!("left out above"),
    };
    schema["description"] = json!(key.doc);
    match key.default {
        Default::None | Default::Required => {}
        Default::Boolean(value) => schema["default"] = json!(value),
        Default::Integer(value) => schema["default"] = json!(value),
        Default::Text(value) => schema["default"] = json!(value),
        Default::Texts(value) => schema["default"] = json!(value),
    }
    schema
}

fn reference(referred: &'static Table, definitions: &mut Map<String, Value>) -> Value {
    if !definitions.contains_key(referred.name) {
        let definition = table(referred, definitions);
        definitions.insert(referred.name.to_owned(), definition);
    }
    json!({ "$ref": format!("#/definitions/{}", referred.name) })
}
