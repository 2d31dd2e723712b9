//! The schemas of a method's types: how a method gets them, and how all of a service become one document.

#[cfg(feature = "schema")]
use std::collections::BTreeMap;
use std::marker::PhantomData;

#[cfg(feature = "schema")]
use schemars::generate::SchemaSettings;
#[cfg(feature = "schema")]
use schemars::{JsonSchema, Schema, SchemaGenerator};
#[cfg(feature = "schema")]
use serde_json::Value;

use super::Method;
#[cfg(feature = "schema")]
use crate::codec::Arguments;
#[cfg(feature = "schema")]
use crate::document::{MethodSchema, ParameterSchema, ServiceSchema};
#[cfg(feature = "schema")]
use crate::error::Fault;

/// What `#[hopline::service]` knows of a method's types. Where all of them have a schema, its own function `describe` is
/// called; where one has not, or without the cargo feature, that of the trait [`Undescribed`] is. So a service compiles in
/// either case.
#[doc(hidden)]
#[derive(Debug)]
pub struct Probe<A, R, E>(PhantomData<(A, R, E)>);

/// See [`Probe`].
#[doc(hidden)]
pub trait Undescribed {
    /// The method as it is, without a schema.
    fn describe(method: Method, _: &[&str]) -> Method {
        method
    }
}

impl<A, R, E> Undescribed for Probe<A, R, E> {}

#[cfg(feature = "schema")]
impl<A: Arguments + JsonSchema, R: JsonSchema, E: JsonSchema> Probe<A, R, E> {
    #[doc(hidden)]
    pub fn describe(method: Method, parameters: &[&str]) -> Method {
        method.schema::<A, R, E>(parameters)
    }
}

/// A [`Fault`] is no error of the method's own.
#[cfg(feature = "schema")]
impl<A: Arguments + JsonSchema, R: JsonSchema> Probe<A, R, Fault> {
    #[doc(hidden)]
    pub fn describe(method: Method, parameters: &[&str]) -> Method {
        method.schema::<A, R, ()>(parameters)
    }
}

/// How the schemas of a method's types are made, when they are asked for.
#[cfg(feature = "schema")]
#[derive(Debug, Clone)]
pub(crate) struct Types {
    parameters: Vec<String>,
    write: fn(&mut SchemaGenerator) -> Written,
}

/// The schemas of all arguments together, of the result, and of the method's own error.
#[cfg(feature = "schema")]
type Written = (Schema, Schema, Option<Schema>);

#[cfg(feature = "schema")]
impl Method {
    /// Tells what the method takes and returns, to those who ask for a [schema](crate::Registry::schema): the types of
    /// its arguments `A`, with the names of its `parameters`, of its result `R` and of its error `E`, which is `()` if it
    /// has none of its own. `#[hopline::service]` does this by itself for a method whose types all have a
    /// `JsonSchema`. Needs the cargo feature `schema`.
    ///
    /// A service does not start if the number of names is not that of the arguments.
    ///
    /// ```
    /// use hopline::{Context, Fault, Method, Service};
    ///
    /// let add = Method::new("add").schema::<(i64, i64), i64, ()>(&["a", "b"]);
    /// let service = Service::new("calculator", 1)
    ///     .method(add, |_: Context, (a, b): (i64, i64)| async move { Ok::<_, Fault>(a + b) });
    /// # let _ = service;
    /// ```
    #[must_use]
    pub fn schema<A: Arguments + JsonSchema, R: JsonSchema, E: JsonSchema>(mut self, parameters: &[&str]) -> Self {
        if A::COUNT != Some(parameters.len()) {
            let count = A::COUNT.map_or_else(|| "any number of".to_owned(), |count| count.to_string());
            self.problem =
                Some(format!("`{}` takes {count} arguments, and names {} of them", self.name, parameters.len()));
        }
        let parameters = parameters.iter().map(|name| (*name).to_owned()).collect();
        self.types = Some(Types { parameters, write: written::<A, R, E> });
        self
    }

    /// What it takes and returns. The definitions that it refers to are left with the generator.
    fn schemas(&self, generator: &mut SchemaGenerator) -> MethodSchema {
        let info = self.info();
        let mut told = MethodSchema {
            name: info.name,
            oneway: info.oneway,
            idempotent: info.idempotent,
            timeout_ms: info.timeout_ms,
            ..MethodSchema::default()
        };
        let Some(types) = &self.types else { return told };
        let (arguments, result, error) = (types.write)(generator);
        // That of a tuple has one for each element, and that of an array has the same one for all.
        let each = |at: usize| match arguments.get("prefixItems") {
            Some(items) => items[at].clone(),
            None => arguments.get("items").cloned().unwrap_or(Value::Bool(true)),
        };
        let named = types.parameters.iter().enumerate();
        let parameters = named.map(|(at, name)| ParameterSchema { name: name.clone(), schema: each(at) });
        told.parameters = Some(parameters.collect());
        (told.result, told.error) = (result.into(), error.map(Value::from));
        told
    }
}

#[cfg(feature = "schema")]
fn written<A: JsonSchema, R: JsonSchema, E: JsonSchema>(generator: &mut SchemaGenerator) -> Written {
    let has_error = E::schema_id() != <()>::schema_id();
    // Not as a reference, since its items are taken apart.
    let arguments = A::json_schema(generator);
    (arguments, generator.subschema_for::<R>(), has_error.then(|| generator.subschema_for::<E>()))
}

/// What these methods take and return, as the document that an instance is asked for.
#[cfg(feature = "schema")]
pub(crate) fn schema_of<'a>(service: &str, instance: &str, methods: impl Iterator<Item = &'a Method>) -> ServiceSchema {
    // As a reader takes it: what may be missing is not required. Both sides read one of the two.
    let mut generator = SchemaSettings::draft2020_12().into_generator();
    let methods = methods.map(|method| method.schemas(&mut generator)).collect();
    let definitions: BTreeMap<_, _> = generator.take_definitions(true).into_iter().collect();
    ServiceSchema { service: service.to_owned(), instance: instance.to_owned(), methods, definitions }
}

#[cfg(all(test, feature = "schema"))]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn methods_share_the_definitions_of_their_types() {
        /// Two numbers.
        #[derive(serde::Deserialize, JsonSchema)]
        #[allow(dead_code, reason = "only its schema is looked at")]
        struct Pair {
            left: u8,
            right: Option<Box<Pair>>,
        }
        let methods = [
            Method::new("put").oneway().schema::<(Pair, Vec<Pair>), (), ()>(&["one", "more"]),
            Method::new("get").schema::<[(); 0], Pair, String>(&[]),
            Method::new("three").schema::<[i64; 3], i64, ()>(&["a", "b", "c"]),
            Method::new("other"),
        ];
        let told = schema_of("pairs.v1", "a1", methods.iter());
        let [put, get, three, other] = &told.methods[..] else { panic!("four of them: {told:?}") };
        let pair = json!({"$ref": "#/$defs/Pair"});
        let parameters = put.parameters.as_ref().expect("it is told");
        assert_eq!((parameters[0].name.as_str(), &parameters[0].schema), ("one", &pair));
        assert_eq!(parameters[1].schema, json!({"type": "array", "items": pair}));
        assert_eq!((&put.result, &put.error, put.oneway), (&json!({"type": "null"}), &None, true));
        assert_eq!((get.parameters.as_deref(), &get.result), (Some(&[][..]), &pair));
        assert_eq!(get.error, Some(json!({"type": "string"})));
        assert_eq!(three.parameters.as_ref().expect("it is told")[2].schema["type"], "integer");
        assert_eq!(other.parameters, None);
        assert_eq!(told.definitions.keys().collect::<Vec<_>>(), ["Pair"]);
        assert_eq!(told.definitions["Pair"]["required"], json!(["left"]));
    }

    #[test]
    fn where_a_type_has_no_schema_its_method_has_none() {
        struct Opaque;
        let plain = <Probe<(i64,), i64, ()>>::describe(Method::new("a"), &["a"]);
        assert!(plain.types.is_some());
        let opaque = <Probe<(i64,), Opaque, ()>>::describe(Method::new("a"), &["a"]);
        assert!(opaque.types.is_none());
        let refused = <Probe<(i64,), i64, Fault>>::describe(Method::new("a"), &["a"]);
        assert!(refused.types.is_some_and(|types| (types.write)(&mut SchemaGenerator::default()).2.is_none()));
    }
}
