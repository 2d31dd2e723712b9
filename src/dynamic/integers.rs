//! The bounds of integers, which a schema leaves to the names of their formats.

use serde_json::{Number, Value};

/// Gives a schema, and each in it, the bounds that the name of its format means, where it has none of its own.
pub(super) fn bound(schema: &mut Value) {
    let Some(members) = schema.as_object_mut() else { return };
    if let Some((least, most)) = members.get("format").and_then(Value::as_str).and_then(bounds) {
        members.entry("minimum").or_insert(least.into());
        members.entry("maximum").or_insert(most.into());
    }
    for (key, value) in members {
        match (key.as_str(), value) {
            // Values, and no schemas.
            ("enum" | "const" | "default" | "examples", _) => {}
            (
                "properties" | "patternProperties" | "$defs" | "definitions" | "dependentSchemas",
                Value::Object(named),
            ) => {
                named.values_mut().for_each(bound);
            }
            (_, Value::Array(several)) => several.iter_mut().for_each(bound),
            (_, one) => bound(one),
        }
    }
}

/// The least and the greatest integer of a format. Those of 128 bits have more room than JSON does here.
fn bounds(format: &str) -> Option<(Number, Number)> {
    Some(match format {
        "int8" => (i8::MIN.into(), i8::MAX.into()),
        "int16" => (i16::MIN.into(), i16::MAX.into()),
        "int32" => (i32::MIN.into(), i32::MAX.into()),
        "int64" | "int" => (i64::MIN.into(), i64::MAX.into()),
        "uint8" => (u8::MIN.into(), u8::MAX.into()),
        "uint16" => (u16::MIN.into(), u16::MAX.into()),
        "uint32" => (u32::MIN.into(), u32::MAX.into()),
        "uint64" | "uint" => (u64::MIN.into(), u64::MAX.into()),
        _ => return None,
    })
}
