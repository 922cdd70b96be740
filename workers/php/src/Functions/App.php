<?php

declare(strict_types=1);

namespace Durable\Functions;

use Durable\Worker\Json;
use Durable\Worker\NonRetryable;
use Durable\Worker\Unreadable;

/**
 * An app's functions, behind one URL. The service posts a run's event and what has been done; the answer is the next operation.
 * It keeps nothing: any process may answer any call.
 */
final class App
{
    public const SDK = 'durable-php/0.1';
    /** Bytes of a body, either way. */
    public const BODY_MAX = 1 << 20;

    /** @var array<string, Definition> by address */
    private array $functions = [];

    /**
     * @param list<Definition> $functions
     * @param list<string> $keys signing keys: one, or two while it is changed. None: unsigned, for development only
     * @param string|null $discovery the app's id, told to who asks in development
     */
    public function __construct(
        public readonly string $name,
        array $functions,
        private readonly array $keys = [],
        private readonly ?string $discovery = null,
    ) {
        foreach ($functions as $function) {
            if (isset($this->functions[$function->address()])) {
                throw new \ValueError("There are two functions {$function->address()}.");
            }
            $this->functions[$function->address()] = $function;
        }
    }

    /** @return list<array<string, mixed>> as they are synced */
    public function definitions(): array
    {
        return array_map(static fn (Definition $one): array => $one->wire(), array_values($this->functions));
    }

    /** Answers the HTTP request that PHP is in: put it at the end of a script behind your URL. */
    public function serve(): void
    {
        $headers = array_change_key_case(function_exists('getallheaders') ? getallheaders() : []);
        $body = (string) file_get_contents('php://input', false, null, 0, self::BODY_MAX + 1);
        [$status, $answer, $more] = $this->answer($_SERVER['REQUEST_METHOD'] ?? 'GET', $headers, $body);
        http_response_code($status);
        foreach ($more + ['content-type' => 'application/json'] as $name => $value) {
            header("$name: $value");
        }
        echo $answer;
    }

    /**
     * The same without PHP's globals, for any framework.
     *
     * @param array<string, string> $headers names in small letters
     * @return array{int, string, array<string, string>} status, body and headers
     */
    public function answer(string $method, array $headers, string $body): array
    {
        if (strlen($body) > self::BODY_MAX) {
            return $this->said(413, ['error' => ['code' => 'payload_too_large', 'message' => 'A body has at most 1 MiB.']]);
        }
        if ($method === 'GET') {
            return $this->manifest($headers);
        }
        if ($method !== 'POST') {
            return $this->said(405, ['error' => ['code' => 'method_not_allowed', 'message' => 'It is GET or POST.']]);
        }
        $key = Signature::signer($body, $headers[Signature::HEADER] ?? null, $this->keys);
        if ($this->keys !== [] && $key === null) {
            return $this->refused();
        }
        try {
            $call = Json::decode($body);
        } catch (Unreadable $error) {
            return $this->said(400, ['error' => ['code' => 'bad_json', 'message' => $error->getMessage()]]);
        }
        if (!$call instanceof \stdClass || !is_string($call->runId ?? null) || !is_string($call->functionId ?? null)
            || !($call->steps ?? new \stdClass()) instanceof \stdClass
        ) {
            return $this->said(400, ['error' => ['code' => 'bad_body', 'message' => 'The body is no call of a function.']]);
        }
        $function = $this->functions[$call->functionId] ?? null;
        if ($function === null) {
            $message = "There is no function $call->functionId here.";

            return $this->said(404, ['error' => ['code' => 'unknown_function', 'message' => $message]]);
        }

        return $this->said(200, $this->next($function, $call), $key);
    }

    /** @return array<string, mixed> the next operation of a run */
    private function next(Definition $function, \stdClass $call): array
    {
        $step = new Step((array) ($call->steps ?? []), $call->runId);
        $event = Event::read($call->event ?? new \stdClass());
        $fiber = new \Fiber(static function () use ($function, $step, $event, $call): mixed {
            if (($call->failure ?? null) instanceof \stdClass && $function->onFailure !== null) {
                return ($function->onFailure)($step, $event, Failed::read($call->failure));
            }

            return ($function->handler)($step, $event);
        });
        try {
            $operation = $fiber->start();
        } catch (\Throwable $error) {
            return ['op' => 'error', 'id' => null] + Step::describe($error);
        }
        $answer = $fiber->isTerminated() ? ['op' => 'done', 'data' => $fiber->getReturn()] : $operation;
        try {
            unset($fiber); // its `finally` blocks run now, and are too late to change anything
        } catch (\Throwable) {
        }

        return $answer;
    }

    /**
     * @param array<string, string> $headers
     * @return array{int, string, array<string, string>}
     */
    private function manifest(array $headers): array
    {
        $time = $headers[Signature::TIMESTAMP] ?? null;
        $key = Signature::signer((string) $time, $headers[Signature::HEADER] ?? null, $this->keys);
        if ($this->keys !== [] && !(Signature::isNow($time) && $key !== null)) {
            return $this->refused();
        }
        $manifest = ['functions' => $this->definitions(), 'sdkVersion' => self::SDK];
        if ($this->discovery !== null && ($headers['x-durable-discovery'] ?? '') === 'true') {
            $manifest += ['appId' => $this->discovery, 'appName' => $this->name, 'signingKey' => $this->keys[0] ?? null];
        }

        return $this->said(200, $manifest, $key);
    }

    /** @return array{int, string, array<string, string>} */
    private function refused(): array
    {
        return $this->said(401, ['error' => ['code' => 'bad_signature', 'message' => 'The signature does not hold.']]);
    }

    /**
     * @param array<string, mixed> $answer
     * @param string|null $key the one that has signed the request
     * @return array{int, string, array<string, string>}
     */
    private function said(int $status, array $answer, ?string $key = null): array
    {
        try {
            $body = Json::encode($answer);
        } catch (\JsonException $error) {
            $why = new NonRetryable("A result is no JSON: {$error->getMessage()}.", 'payload_type');
            $body = Json::encode(['op' => 'error', 'id' => $answer['id'] ?? null] + Step::describe($why));
        }
        if (strlen($body) > self::BODY_MAX) {
            $why = new NonRetryable('A result has more than 1 MiB. Keep it elsewhere, and return where.', 'payload_too_large');
            $body = Json::encode(['op' => 'error', 'id' => $answer['id'] ?? null] + Step::describe($why));
        }

        $key ??= $this->keys[0] ?? null;

        return [$status, $body, $key === null ? [] : [Signature::HEADER => Signature::of($body, $key)]];
    }
}
