//! Whether a schema can be checked in bounded time. It comes from a peer, and few bytes of it can stand for years of work.

use std::collections::BTreeMap;

use serde_json::Value;

/// How many schemas may have to be looked at for one value.
const MAX: u64 = 10_000;
/// How deep schemas may be in each other.
const MAX_DEPTH: u64 = 128;
/// How many schemas there may be in all.
const MAX_NODES: u64 = 100_000;

/// Looks at a schema and at what it refers to, by `#/$defs/NAME`.
///
/// # Errors
/// A sentence, if it refers to others in another way or to itself without end, or if it is too large.
pub(super) fn bounded(schema: &Value, definitions: &BTreeMap<String, Value>) -> Result<(), String> {
    let mut walk = Walk { definitions, costs: BTreeMap::new(), within: vec![schema], depth: 0, nodes: 0 };
    while let Some(schema) = walk.within.pop() {
        walk.cost(schema)?;
    }
    Ok(())
}

struct Walk<'a> {
    definitions: &'a BTreeMap<String, Value>,
    /// How many schemas each definition is for one value. `None` while that is counted.
    costs: BTreeMap<&'a str, Option<u64>>,
    /// Schemas of what lies in a value, which are looked at by themselves.
    within: Vec<&'a Value>,
    /// How deep the one is that is looked at.
    depth: u64,
    /// How many were looked at.
    nodes: u64,
}

impl<'a> Walk<'a> {
    /// How many schemas have to be looked at for one value, without what lies in that.
    fn cost(&mut self, schema: &'a Value) -> Result<u64, String> {
        (self.depth, self.nodes) = (self.depth + 1, self.nodes + 1);
        if self.depth > MAX_DEPTH || self.nodes > MAX_NODES {
            return Err("it is too large to be checked".to_owned());
        }
        let cost = self.cost_of_members(schema);
        self.depth -= 1;
        cost
    }

    fn cost_of_members(&mut self, schema: &'a Value) -> Result<u64, String> {
        let Some(members) = schema.as_object() else { return Ok(1) };
        let mut cost = 1_u64;
        for (key, value) in members {
            match key.as_str() {
                // Values, and no schemas.
                "enum" | "const" | "default" | "examples" => {}
                "$ref" => cost = cost.saturating_add(self.referred(value)?),
                // The last two look at the branches once more.
                "$dynamicRef"
                | "$recursiveRef"
                | "$id"
                | "$anchor"
                | "$dynamicAnchor"
                | "unevaluatedProperties"
                | "unevaluatedItems" => {
                    return Err(format!("it has a `{key}`"));
                }
                "anyOf" | "oneOf" | "allOf" => {
                    for part in value.as_array().into_iter().flatten() {
                        cost = cost.saturating_add(self.cost(part)?);
                    }
                }
                "not" | "if" | "then" | "else" => cost = cost.saturating_add(self.cost(value)?),
                "dependentSchemas" => {
                    for part in value.as_object().into_iter().flat_map(|parts| parts.values()) {
                        cost = cost.saturating_add(self.cost(part)?);
                    }
                }
                "properties" | "patternProperties" | "$defs" | "definitions" => {
                    self.within.extend(value.as_object().into_iter().flat_map(|parts| parts.values()));
                }
                _ => match value {
                    Value::Array(parts) => self.within.extend(parts),
                    part => self.within.push(part),
                },
            }
        }
        if cost > MAX { Err("it is too large to be checked".to_owned()) } else { Ok(cost) }
    }

    fn referred(&mut self, reference: &'a Value) -> Result<u64, String> {
        let name = reference.as_str().and_then(|path| path.strip_prefix("#/$defs/"));
        let definition = name.and_then(|name| self.definitions.get_key_value(name));
        let Some((name, definition)) = definition else { return Err(format!("it refers to {reference}")) };
        match self.costs.insert(name, None) {
            Some(None) => Err(format!("`{name}` is nothing but itself")),
            Some(cost) => {
                self.costs.insert(name, cost);
                Ok(cost.unwrap_or(1))
            }
            None => {
                let cost = self.cost(definition)?;
                self.costs.insert(name, Some(cost));
                Ok(cost)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn told(schema: Value, definitions: Value) -> Result<(), String> {
        bounded(&schema, &serde_json::from_value(definitions).expect("a map"))
    }

    #[test]
    fn honest_schemas_are_bounded() {
        let list = json!({"List": {"type": "object", "properties": {"next": {"anyOf": [{"$ref": "#/$defs/List"}, {"type": "null"}]},
            "$ref": {"type": "string"}}}});
        assert_eq!(told(json!({"type": "array", "items": {"$ref": "#/$defs/List"}}), list), Ok(()));
        assert_eq!(told(json!({"default": {"$ref": "x"}, "prefixItems": [true, {"type": "null"}]}), json!({})), Ok(()));
    }

    #[test]
    fn a_schema_that_takes_too_long_is_refused() {
        let twice = |number| {
            let next = json!({"$ref": format!("#/$defs/A{}", number + 1)});
            (format!("A{number}"), json!({ "anyOf": [next, next] }))
        };
        let mut definitions: serde_json::Map<_, _> = (0..60).map(twice).collect();
        definitions.insert("A60".to_owned(), json!({"type": "string"}));
        let a0 = json!({"$ref": "#/$defs/A0"});
        let large = Err("it is too large to be checked".to_owned());
        assert_eq!(told(a0.clone(), definitions.clone().into()), large);
        assert_eq!(told(json!({"items": {"properties": {"a": a0}}}), definitions.into()), large);
        let chain = |number| (format!("A{number}"), json!({"$ref": format!("#/$defs/A{}", number + 1)}));
        let chain: serde_json::Map<_, _> = (0..100_000).map(chain).collect();
        assert_eq!(told(json!({"$ref": "#/$defs/A0"}), chain.into()), large);
        let round = json!({"A": {"allOf": [{"$ref": "#/$defs/B"}]}, "B": {"not": {"$ref": "#/$defs/A"}}});
        assert_eq!(told(json!({"$ref": "#/$defs/A"}), round), Err("`A` is nothing but itself".to_owned()));
        assert_eq!(told(json!({"$ref": "http://x/y"}), json!({})), Err("it refers to \"http://x/y\"".to_owned()));
        assert_eq!(told(json!({"not": {"$dynamicRef": "#a"}}), json!({})), Err("it has a `$dynamicRef`".to_owned()));
    }
}
