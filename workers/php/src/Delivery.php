<?php

declare(strict_types=1);

namespace Durable\Worker;

/** One task that a transport has brought, and what may be done about it. All but `read` may throw what the broker says. */
interface Delivery
{
    /**
     * The message, decoded.
     *
     * @throws Unreadable
     */
    public function read(): mixed;

    /** Ours for a while longer. False: it was cancelled, or is another's by now, and nobody wants an answer of us. */
    public function keep(): bool;

    /** Hand the answer over, then acknowledge the task. */
    public function answer(Answer $answer): void;

    /** Another worker may have it, as the same attempt. */
    public function giveBack(): void;

    /** Acknowledge it, without an answer. */
    public function drop(): void;

    /** Put away what cannot be read. */
    public function refuse(string $why): void;
}
