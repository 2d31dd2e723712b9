//! What the name of a type tells. A macro sees no more of a type than its name.

use quote::ToTokens;
use syn::visit::{self, Visit};
use syn::{GenericArgument, Lifetime, Path, PathArguments, PathSegment, Type, TypeImplTrait, TypeReference};

use crate::refusals::Refusals;
use crate::text::type_text;

/// The type arguments, if the type is called `Result`.
pub(crate) fn result_arguments(ty: &Type) -> Option<Vec<&Type>> {
    last_segment(ty).filter(|segment| segment.ident == "Result").map(type_arguments)
}

fn type_arguments(segment: &PathSegment) -> Vec<&Type> {
    let PathArguments::AngleBracketed(arguments) = &segment.arguments else {
        return Vec::new();
    };
    let types = arguments.args.iter().filter_map(|argument| match argument {
        GenericArgument::Type(ty) => Some(ty),
        _ => None,
    });
    types.collect()
}

/// A type called `Context`.
pub(crate) enum ContextType {
    /// `&Context`: the right way to write it.
    Lent,
    /// `Context`, `&mut Context` or `&'a Context`: refused with a hint.
    Other,
}

/// Whether a type is called `Context`, and how it is written.
pub(crate) fn as_context(ty: &Type) -> Option<ContextType> {
    let is_context =
        |ty| last_segment(ty).is_some_and(|segment| segment.ident == "Context" && segment.arguments.is_none());
    match peel(ty) {
        Type::Reference(reference) if is_context(&reference.elem) => {
            let plain = reference.mutability.is_none() && reference.lifetime.is_none();
            Some(if plain { ContextType::Lent } else { ContextType::Other })
        }
        ty => is_context(ty).then_some(ContextType::Other),
    }
}

fn last_segment(ty: &Type) -> Option<&PathSegment> {
    match peel(ty) {
        Type::Path(path) => path.path.segments.last(),
        _ => None,
    }
}

/// The type without parentheses around it, and without the group that the compiler adds to one that comes through
/// `macro_rules!`.
fn peel(mut ty: &Type) -> &Type {
    loop {
        ty = match ty {
            Type::Group(group) => &group.elem,
            Type::Paren(paren) => &paren.elem,
            _ => return ty,
        }
    }
}

pub(crate) fn is_unit(ty: &Type) -> bool {
    matches!(peel(ty), Type::Tuple(tuple) if tuple.elems.is_empty())
}

/// Refuses types with references, lifetimes, `impl Trait` and `Self`. They mean something only in this program, so the
/// other side could not read them. `what` says in the error whether it is an argument or a result.
pub(crate) fn refuse_borrows(what: &'static str, ty: &Type, refusals: &mut Refusals) {
    Borrows { what, refusals }.visit_type(ty);
}

struct Borrows<'a> {
    what: &'static str,
    refusals: &'a mut Refusals,
}

impl<'ast> Visit<'ast> for Borrows<'_> {
    fn visit_type_reference(&mut self, reference: &'ast TypeReference) {
        let sentence = format!("{} cannot be borrowed: write `{}`", self.what, owned(&reference.elem));
        self.refusals.add(reference, sentence);
    }

    fn visit_lifetime(&mut self, lifetime: &'ast Lifetime) {
        let sentence = format!("{} has no lifetime: write an owned type, such as `String`", self.what);
        self.refusals.add(lifetime, sentence);
    }

    fn visit_type_impl_trait(&mut self, ty: &'ast TypeImplTrait) {
        let sentence = format!("{} is one type, known to both sides: write its name", self.what);
        self.refusals.add(ty, sentence);
    }

    fn visit_path(&mut self, path: &'ast Path) {
        if path.segments.first().is_some_and(|segment| segment.ident == "Self") {
            let sentence = format!("{} is one type, known to both sides: write its name, not `Self`", self.what);
            self.refusals.add(path, sentence);
        }
        visit::visit_path(self, path);
    }
}

/// Refuses an `Option` of a type that is written as null itself, such as `Option<()>`. `Some` of it would arrive as
/// `None`.
pub(crate) fn refuse_lost_options(ty: &Type, refusals: &mut Refusals) {
    LostOptions(refusals).visit_type(ty);
}

struct LostOptions<'a>(&'a mut Refusals);

impl<'ast> Visit<'ast> for LostOptions<'_> {
    fn visit_type(&mut self, ty: &'ast Type) {
        if let Some([inner]) = option_arguments(ty).as_deref()
            && may_be_null(inner)
        {
            let instead = if is_unit(inner) { "write `bool`" } else { "write an enum that names the cases" };
            let ty_text = type_text(ty.to_token_stream());
            return self.0.add(ty, format!("in `{ty_text}`, `Some` of nothing would arrive as `None`: {instead}"));
        }
        visit::visit_type(self, ty);
    }
}

fn option_arguments(ty: &Type) -> Option<Vec<&Type>> {
    last_segment(ty).filter(|segment| segment.ident == "Option").map(type_arguments)
}

/// Whether a value of the type may be written as null, as far as its name tells.
fn may_be_null(ty: &Type) -> bool {
    let boxed = |segment: &&PathSegment| ["Box", "Rc", "Arc"].iter().any(|name| segment.ident == name);
    match last_segment(ty).filter(boxed).map(type_arguments).as_deref() {
        Some([inner]) => may_be_null(inner),
        _ => is_unit(ty) || option_arguments(ty).is_some_and(|arguments| arguments.len() == 1),
    }
}

/// The owned type to write in place of a borrowed one.
fn owned(borrowed: &Type) -> String {
    match peel(borrowed) {
        Type::Reference(reference) => owned(&reference.elem),
        Type::Slice(slice) => format!("Vec<{}>", owned(&slice.elem)),
        Type::Path(path) if path.path.is_ident("str") => "String".to_owned(),
        Type::Path(path) if path.path.is_ident("Path") => "PathBuf".to_owned(),
        ty => type_text(ty.to_token_stream()),
    }
}
