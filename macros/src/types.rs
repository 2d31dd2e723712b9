//! What can be told from a type's name alone.

use quote::ToTokens;
use syn::visit::{self, Visit};
use syn::{GenericArgument, Lifetime, Path, PathArguments, PathSegment, Type, TypeImplTrait, TypeReference};

use crate::refusals::Refusals;
use crate::text::type_text;

/// The type arguments, if the type is called `Result`.
pub(crate) fn result_arguments(ty: &Type) -> Option<Vec<&Type>> {
    let segment = last_segment(ty).filter(|segment| segment.ident == "Result")?;
    let PathArguments::AngleBracketed(arguments) = &segment.arguments else {
        return Some(Vec::new());
    };
    let types = arguments.args.iter().filter_map(|argument| match argument {
        GenericArgument::Type(ty) => Some(ty),
        _ => None,
    });
    Some(types.collect())
}

/// A type called `Fault`: the error that is not a service's own.
pub(crate) fn is_fault(ty: &Type) -> bool {
    last_segment(ty).is_some_and(|segment| segment.ident == "Fault" && segment.arguments.is_none())
}

/// A type called `Context`.
pub(crate) enum ContextType {
    /// `&Context`
    Lent,
    /// `Context`, `&mut Context`, `&'a Context`
    Other,
}

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

/// The type without parentheses, and without the group around one that comes through `macro_rules!`.
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

/// Refuses what means something only here and now: it could not be read at the other end.
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

/// What to write for a borrowed type.
fn owned(borrowed: &Type) -> String {
    match peel(borrowed) {
        Type::Reference(reference) => owned(&reference.elem),
        Type::Slice(slice) => format!("Vec<{}>", owned(&slice.elem)),
        Type::Path(path) if path.path.is_ident("str") => "String".to_owned(),
        Type::Path(path) if path.path.is_ident("Path") => "PathBuf".to_owned(),
        ty => type_text(ty.to_token_stream()),
    }
}
