use hopline::{Context, Fault, Method, Service};

fn main() {
    let put = |_: Context, id: u64| async move { Ok::<_, Fault>(id) };
    let _ = Service::new("store", 1).method(Method::new("put"), put);
}
