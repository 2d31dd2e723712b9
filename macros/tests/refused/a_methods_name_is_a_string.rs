#[hopline::service]
trait Demo {
    #[rpc(name = put)]
    async fn put(&self);
}

fn main() {}
